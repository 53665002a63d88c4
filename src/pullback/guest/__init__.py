"""The small guest: a real Linux, built from the distribution's packages, that boots in seconds.

`build` makes it, `disks` makes and checks its disks, `run` boots it in one of its modes; `records`
and `turns` read on the host what it wrote. `inside/` is what runs in it.
"""
