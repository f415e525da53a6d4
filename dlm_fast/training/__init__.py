"""Training of the two tiny models that the demo and the benchmarks decode, on a CPU.

    python -m dlm_fast.training --model block-causal --out runs/block --steps 8000
    python -m dlm_fast.training --model full --out runs/full --init runs/block --steps 3600 --muon-lr 0.005 --decay 0.9

The full model starts from the block-causal one, whose objective gets several times as many predictions out
of a forward. Each run ends with a folder that transformers loads; until then, --resume goes on from the
last checkpoint.
"""
