"""Pullback: live, incremental backup and rollback of QEMU/KVM virtual machines."""

__version__ = "0.1.0"
