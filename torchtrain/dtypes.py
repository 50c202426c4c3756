"""The types of tensors by the names that a config, or a tool's command line, has for them."""

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
