"""What every rank would do anew, done once by the process of which ranks are forks: see `forking`.

Nothing here may start a thread, or join a process group: a fork has neither.
"""

from torchtrain.config.options import options

options()  # describes every field of the config, a twentieth of a small run
