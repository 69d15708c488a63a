"""Operations on KV, digests, plans and logits: a plain reference of each, and its fast bodies.

Not here: where KV lies (kvstore), what a head should read (planning), and requests.
"""
