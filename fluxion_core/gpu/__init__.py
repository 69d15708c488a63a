"""A decode step on a CUDA device: dense part and window there, KV and the other half here; and a
prompt's KV on its way out of one.

pinned.py       host memory that both sides read and write
board.py        flags and rows through which GPU and host hand layers to each other
step_graph.py   CUDA graphs as handles that native code launches
device_digests.py  copies of the store's digests in spare device memory
lane.py         the GPU's end of the task queue
device_step.py  one step: its graphs, and the host's side of it
step_times.py   where a step's time went
kv_outbox.py    copies of a prompt's KV that run beside its computing
stopwatch.py    how long the device took
uva_rate.py     how fast the GPU reads host memory in place
"""
