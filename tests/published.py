"""The published command lines, which must keep working verbatim."""

TRAIN = (
    "train_router.py --results-dir results --model DiT-XL/2 --image-size 256 --num-classes 1000 "
    "--epochs 2000 --global-batch-size 64 --global-seed 42 --vae ema --num-works 8 --log-every 100 "
    "--ckpt-every 1000 --wandb --num-sampling-steps 10 --l1 7e-8 --lr 0.01 --max-steps 20000 "
    "--cfg-scale 1.5 --ste-threshold 0.1 --lambda-c 500"
)
SAMPLE = (
    "sample.py --model DiT-XL/2 --vae ema --image-size 256 --num-classes 1000 --cfg-scale 4 "
    "--num-sampling-steps 10 --seed 42 --accelerate-method dynamiclayer --ddim-sample "
    "--path Path/To/The/Trained/Router/ --thres 0.1"
)
