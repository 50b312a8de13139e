"""The arithmetic of the fast engine. `ops.py` is its table of contents; start there.

Each operation is written twice with one signature: `reference/<op>.py` in plain PyTorch, to be read and believed, and
`fused/<op>.py` in Triton, to be fast, with a backward derived by hand. `ops.py` picks one by device, wraps it for
autograd and says which it picked. Nothing here knows of models, configs or files.
"""
