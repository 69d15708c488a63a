"""The decode node: takes requests, gets their prompts' KV, decodes and streams tokens.

Not here: a step (fluxion_core/decode), and the wire's rules (fluxion_core/wire).
"""
