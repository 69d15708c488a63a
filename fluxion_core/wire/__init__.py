"""gRPC and protobuf: servers, channels, frames as bytes, errors as statuses, who may call.

Not here: what a call does.
"""
