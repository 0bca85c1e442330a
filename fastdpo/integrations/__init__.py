"""fastdpo inside other trainers: `fastdpo.integrations.trl`, `fastdpo.integrations.liger`.

Nothing is imported here: each module needs the package that it is named after, or nothing at all.
"""
