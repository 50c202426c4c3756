"""The historic name of the command `python -m torchtrain.tools.prepare`, which is a tool."""

import runpy

if __name__ == "__main__":
    runpy.run_module("torchtrain.tools.prepare", run_name="__main__", alter_sys=True)
