import os

# Two processors of one core: one thread is faster, and processes of a test do not fight.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Lightning's accelerator probes and TensorBoard's protobuf need no accelerator.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
