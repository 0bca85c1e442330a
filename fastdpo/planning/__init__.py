"""Will it fit? One training step on tensors without data, whose allocations are counted by owner.

`fastdpo plan` prints the answer, `memory:` in a config lets a run choose by it. The step is the trainer's own
code under torch's FakeTensorMode, as torch's MemTracker and its estimators use it; tensors that a GPU would
hold and a CPU would not are stood in for (stand_ins.py).
"""
