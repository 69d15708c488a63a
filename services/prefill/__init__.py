"""The prefill node: computes prompts chunk by chunk, and streams their KV to who asked.

Not here: stored KV, and a prompt's attention (fluxion_core/prompt).
"""
