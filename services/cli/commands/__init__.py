"""The commands of `fluxion`, a file each: a dataclass whose fields are the options.

These modules are light, since `fluxion --help` imports all of them: what a command needs to do its
work is imported when it is called.
"""
