"""Programs that judge the emulator's checker: deliberately broken ones, and correct ones.

``kinds`` has each kind of bug with its correction beside it: the first must be reported under its
name, the second must not. ``clean`` has whole programs without a bug: none may be reported.
"""
