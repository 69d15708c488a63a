"""A decode step on a CUDA device: dense part and window there, the regions by both devices.

Not here: requests, and how plans are fitted.

pinned.py    host memory that both sides read and write
board.py     flags and rows through which GPU and host hand layers to each other
graph.py     CUDA graphs as handles that native code launches
windows.py   rings of the newest KV, by slot
digests.py   copies of the store's digests in spare device memory, in places of digest_places.py
planner.py   plans of heads, made within the step's graph
lane.py      the GPU's end of the task queue
step.py      one step: its graphs, and the host's side of it
times.py     where a step's time went
spans.py     the same as spans of a trace
"""
