"""Nine minutes on a GPU: is the kernel right, how fast is it beside others, which launch is fastest there.

    python -m dit_accel.evals.gpu_bench --minutes 9 --out DIR

Runs from a bare checkout with torch and triton alone. `schedule` says what is done and in which order,
`driver` does it within the time, `process` and `worker` are the two ends of the processes that touch the GPU,
and each of `checks`, `attention`, `backward`, `launches`, `steps` and `profile` is one kind of work.
"""
