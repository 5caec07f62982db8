"""The update rule: pure functions of tensors. Imports torch, and nothing of this package outside this folder.

update.py               THE rule, from gradients to new parameters: start here
types.py                what passes between its parts, by name
context.py              what the tensor head sees: one registry
features.py             what the cell sees, coordinate by coordinate: one registry
cells.py                the recurrent cells, behind one protocol
orthogonalize.py        what happens to the update of a matrix
safeguard.py            how far a tensor's step is the rule's, and how far AdamW's
config.py               ``PolicyConfig``: everything but the weights
layouts.py              sums over tensors that share a vector, and per-tensor values spread over it
stochastic_rounding.py  state in two bytes
ops.py                  elementwise operations that are fast both compiled and not
"""
