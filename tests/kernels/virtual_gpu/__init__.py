"""A GPU of NumPy lanes: it runs the PTX that Triton compiles for NVIDIA's parts, and refuses what they let pass.

The interpreter shows that the kernels mean the right thing. This shows that what is compiled of them, with the tiles of
the table, in bfloat16 too, does it: layouts, alignment, asynchronous copies and products, the order of shared memory.
`program` reads PTX, `lanes` computes, `memory` watches every access, `block` runs the whole, `driver` stands where
Triton would launch. Nothing here is fast, and it knows the instructions that our kernels compile to on sm_80, sm_89,
sm_90 and sm_120, no others. It has no caches and no proxies: a missing fence between ordinary writes and warpgroup
products, or between the registers of two of those, is not found.
"""
