"""fastdpo inside other trainers: `trl`, `liger`, `axolotl`, `llama_factory`, `unsloth`.

Nothing is imported here: each module needs the package that it is named after, or nothing at all.
"""
