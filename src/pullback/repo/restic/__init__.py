"""restic's repository format, version 2 (and 1): the codecs, and what is built on them.

Source: the design document of restic, "References / Design". Section names in docstrings are its.
"""
