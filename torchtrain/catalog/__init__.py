"""What a config can name, as data: models, optimizers, datasets, pipeline schedules.

The tables are filled here, and by the user's own file (`experimental.custom_import`), with
`register_model`, `register_optimizer` and `register_corpus`.
"""
