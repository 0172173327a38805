#!/usr/bin/env bash
# Measure this project on an NVIDIA GPU, the most telling part first:
#
#     bash results/measure_gpu.sh [FOLDER]    # images, train/<class>/ and test/<class>/ in FOLDER
#
# Needs what requirements.txt names, and no network. Writes results/gpu/, a file a part; a part that
# hangs is killed, and what is done stays if you stop it.
set -u
images=shapes
[ $# -gt 0 ] && images=$(realpath "$1")
cd "$(dirname "$0")/.."
out=$PWD/results/gpu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$out"
rm -f "$out"/[1-6]_*.txt
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 TRITON_CACHE_DIR=$work/triton

part() {  # part SECONDS FILE COMMAND...: what it prints, its exit status and its time
    local seconds=$1 file=$out/$2 started=$SECONDS
    shift 2
    timeout -k 5 "$seconds" "$@" >>"$file" 2>&1
    echo "$*: exit status $? after $((SECONDS - started)) s" | tee -a "$file"
}

nvidia-smi >"$out/1_machine.txt" || exit 1
part 150 2_kernels.txt python3 - <<'PYTHON'
import time, torch, traceback, data, runtime, train
from kernels import self_test, step
from recipes import RECIPES

print(runtime.versions(), torch.cuda.get_device_name(), time.strftime("%Y-%m-%d"))
step.self_test = lambda fused: None  # its errors are printed here, all of them
dataset = data.load_shapes(3000, 100).to("cuda")


def measure(recipe, precision):
    gpu = runtime.Runtime("cuda", precision, "triton")
    fused = train.Trainer(RECIPES[recipe], dataset, gpu, seed=1).fused_step
    for kind, name, actual, exact in self_test.train_and_compare(fused, [torch.float64]):
        print(f"    {kind} {name}: off by {self_test.relative_error(actual, exact):.1e}")
    for count in (20, 500):  # the first ones warm up
        started = time.perf_counter()
        for i in range(count):
            fused.step(i % 5)
        torch.cuda.synchronize()
    print(f"    {1e6 * (time.perf_counter() - started) / count:.1f} us a step")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for i in range(20):
            fused.step(i % 5)
        torch.cuda.synchronize()
    print(profile.key_averages().table(sort_by="cuda_time_total", row_limit=16))


cases = [("default", "bf16"), ("original", "bf16"), ("long", "bf16"), ("default", "fp32")]
for case in cases:
    print(*case)
    try:
        measure(*case)
    except Exception:  # the next one may run
        traceback.print_exc()
PYTHON
run="python3 train.py --data '$images' --data-dir $work/data --out $work --kernels"
export TRITON_CACHE_DIR=$work/cold
for recipe in default default original; do  # with cold caches, with warm ones, another recipe
    part 150 3_train.txt bash -c "time $run triton --recipe $recipe"
done
part 60 5_torch.txt bash -c "time $run torch --epochs 4"
part 120 6_bench.txt python3 bench.py --rounds 3 --variants eager auto --csv "$out/bench.csv"
for name in kernels step train; do
    part 150 4_tests.txt python3 -m pytest -q --tb=short "tests/test_$name.py"
done
part 300 6_bench.txt python3 bench.py --rounds 3 --csv "$out/bench_compile.csv"
