"""The engine room: a QEMU process frozen, tracked and exported, through its monitor. Async."""
