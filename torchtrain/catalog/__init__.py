"""What a config can name, as data: models, optimizers, datasets, pipeline schedules.

The tables are filled here, and by the user's own file (`experimental.custom_import`), with
`register_model`, `register_optimizer` and `register_corpus`.
"""

from torchtrain.catalog.llama import LLAMA_2, LLAMA_3
from torchtrain.catalog.mixtral import MIXTRAL
from torchtrain.catalog.models import TRANSFORMER, register_model
from torchtrain.catalog.qwen3 import QWEN3

register_model("llama2", LLAMA_2, TRANSFORMER)
register_model("llama3", LLAMA_3, TRANSFORMER)
register_model("mixtral", MIXTRAL, TRANSFORMER)
register_model("qwen3", QWEN3, TRANSFORMER)
