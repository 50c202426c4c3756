"""Many runs of one config file that differ in some keys: `python -m torchtrain.tools.sweep`."""
