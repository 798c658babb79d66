"""Programs for those who work on the Triton kernels: ahead-of-time compilation for every target, and tuning on a GPU.

They may import everything else of the package, and nothing else may import them.
"""
