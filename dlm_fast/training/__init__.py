"""Training: pretraining of the embedded models, distillation of any supported model, and learned policies.

    python -m dlm_fast.training pretrain --out runs/full --threads 2
    python -m dlm_fast.training samples --out runs/samples.jsonl --n 150000
    python -m dlm_fast.training distill --model runs/full --data runs/samples.jsonl --out runs/block --block-length 8
    python -m dlm_fast.training policy --kind filter --model runs/full --out runs/filter.safetensors
    python -m dlm_fast.training trajectories --model runs/full --data runs/samples.jsonl --out runs/ordered.jsonl \\
        --block-length 8
    python -m dlm_fast.training curves runs/full/log.jsonl --out curves.png

Every run writes safetensors at its end. With --resume, pretraining and distillation go on from their last checkpoint.
In Python, call `dlm_fast.training.distill.Distiller(DistillSettings(...)).run()` and `dlm_fast.training.policy.train`.
"""
