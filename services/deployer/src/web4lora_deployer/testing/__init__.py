"""What is measured of a model: the two jobs `verify` (a deployment) and `evaluate` (a model anywhere).

`measure` runs a suite on one model at a time and keeps what it found; `differences` says why answers changed,
`llama_bench` how fast the machine could be. `check_suite` reads a suite in a process of its own, `endpoints`
says which addresses may be asked, `report_messages` turns findings into the contract's messages.
"""
