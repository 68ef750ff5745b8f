"""The operations on an NVIDIA GPU: Triton kernels around cuBLAS products. Imported only where they are asked for.

norm.py        residual + what is added, and the norm of it
qkv.py         query-key-value: bias, QK-norm, rotation, store
activation.py  gate and up to the hidden layer
attend.py      queries of one tile over a range of keys: what both kinds of attention have inside
split.py       attention of few rows, keys split over programs and merged
prefill.py     attention of many rows, all keys in one program
matmul.py      a product whose rows do not know each other
work.py        which tile of queries reads which keys, decided on the host once a step
operations.py  `CudaKernels`: all of it as `interface.Kernels`

Nothing here needs a GPU to be read or tested: with TRITON_INTERPRET=1 the same kernels run on CPU tensors.
"""
