"""A pipeline's settings, defined once: names, bounds, defaults, and the rules between them.

The contract (`web4.lora.v1.Pipeline`) says which settings there are and what each means; `train`, `package`,
`deploy` and `verify` say what each may hold and what it holds when absent; `rules` is what those are made of;
`check` looks at a whole pipeline. A new setting is a field of the contract and a line here.
"""
