"""What arguments of users may be: tables of rules, and functions that are called with what passes them.

::

    rules.py      flags, numbers, words, sizes, objects
    places.py     names of files and folders
    devices.py    torch's devices
    checked.py    a function whose arguments pass a table of rules
    brief.py      what came, as a short text
"""
