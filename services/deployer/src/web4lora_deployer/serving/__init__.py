"""What a deployment goes through: deployed and asked, promoted or rolled back, watched, let go.

`deploy` makes a candidate, `automatic` on the first runtime that can; `first_answer` proves that it answers.
`promotion` points names at candidates and lets go of the superseded; `guard` rolls a name back whose model
fails for good. `adapters` sets how strongly a deployment's adapters apply.
"""
