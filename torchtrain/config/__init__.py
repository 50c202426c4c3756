"""The configuration of a run: typed sections, from a TOML file and the command line, checked.

schema: the fields           options: the fields described, for --help and messages
reading: TOML, command line  faults: what is wrong with one key
checks: what is wrong with keys together
plans: what follows from the values and the world size
"""
