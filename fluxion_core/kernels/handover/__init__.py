"""A layer's hand-over between the GPU and the host: queries out, attention states back."""
