"""A decode step on a CUDA device: dense part and window there, KV and the other half here.

pinned.py       host memory that both sides read and write
step_graph.py   CUDA graphs as handles that native code launches
lane.py         the GPU's end of the task queue
device_step.py  one step: its graph, its board of flags, its accounting
"""
