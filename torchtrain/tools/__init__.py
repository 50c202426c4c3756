"""What a user runs beside training."""

import sys

from torchtrain.installation import PROGRAM, exit_without_dependencies

exit_without_dependencies()

# Tools import train.py as `train`. It goes first, so that a train.py in the user's own folder is
# not taken for it.
if sys.path[0] != str(PROGRAM):
    sys.path.insert(0, str(PROGRAM))
