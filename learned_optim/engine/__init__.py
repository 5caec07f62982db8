"""How the rule is run over a model's tensors, without gradients and in place. Knows nothing of policies and files.

step.py             the passes of a step, over buckets of tensors: start here
head.py             the tensor head over many tensors at once
auto.py             which backend runs: ``make_backend``
eager.py            plain torch operations
native.py           compiled C++, on CPUs; native_library.py makes it of the rule, through codegen.py and *.cpp
native_matrices.py  orthogonalising in C++
gpu.py              Triton kernels, on GPUs; gpu_kernels.py makes them of the rule
traced.py           the rule's passes for one coordinate, as statements: what C++ and Triton kernels share
kernels.py          the compilers, and the tensor head as torch.compile makes it, for GPUs
graph.py            the whole step as one CUDA graph; device_scalars.py: the numbers that change with every step
offload.py          state on the host, lent to a GPU for the time of a step
products.py         matrix products as GPUs like them
packing.py          small tensors side by side in one vector
kinds.py            what a group says its tensors are: stacks, packed matrices, roles
param_state.py      one tensor with gradient and state, as backends see it
collect.py          what a step updates: groups checked, state completed and kept from step to step
state_checks.py     whether state belongs to its parameter
uncounted.py        tensors for which a step does not count: their gradient is not finite, or zero so far
hyperparameters.py  parameter groups: checks, and the hyperparameters of a step
sharding.py         parameters spread over processes
cut_matrices.py     orthogonalising a matrix of which several processes hold parts
"""
