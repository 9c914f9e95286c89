"""What computes the network fastest on a processor: PyTorch as it is, compiled, in bfloat16, ONNX Runtime, OpenVINO

    COVID3D_TEST_DATA=folder python benchmarks/runtimes.py [--rounds 9] [--threads 2] [--ways eager,…]

The weights of the package and all windows of P001 of COVID-CT-MD (512×512×148), four at a time, as the sliding window gives them. All ways take turns, each in a process of its own.
`start_s` is what a way needs before its first answer, importing and compiling included (and importing PyTorch, without which there is no library); `scan_s` is the time for all windows: median, least and greatest of the rounds;
`apart` the largest difference of a probability from PyTorch's, `flips` the voxels of 100,000 that fall on the other side of the threshold. A row a way in benchmarks/runtimes.csv.
Needs onnx, onnxscript, onnxruntime and openvino.
"""
import argparse, os, statistics, subprocess, sys, tempfile, time
from itertools import product
from pathlib import Path

import numpy as np, pandas as pd

here = Path(__file__).parent
ways = 'eager','channels last','bfloat16','compiled','ONNX Runtime','OpenVINO','OpenVINO bfloat16'

def windows(threads):
    "All windows of P001, four at a time"
    import torch
    from covid3d.dicom import open_scan
    from covid3d.inference import window_starts
    from covid3d.transforms import crop
    from covid3d.weights import load_all, weights_in
    torch.set_num_threads(threads)
    spec = load_all(weights_in('covid3d'), 'cpu')[1]
    x = spec.prepare(open_scan(Path(os.environ['COVID3D_TEST_DATA'])/'covid_ct_md'/'P001'))
    at = [*product(*(window_starts(n, p) for n,p in zip(x.shape[1:], spec.patch)))]
    return torch.stack([crop(x, o, spec.patch) for o in at]).numpy()

def ready(way, threads, onnx):
    "A function from windows to probabilities"
    if way=='ONNX Runtime':
        import onnxruntime as ort
        o = ort.SessionOptions(); o.intra_op_num_threads = threads
        s = ort.InferenceSession(onnx, o, providers=['CPUExecutionProvider'])
        return lambda x: s.run(None, dict(ct=x))[0]
    if way.startswith('OpenVINO'):
        import openvino as ov
        precision = 'bf16' if 'bfloat16' in way else 'f32'
        m = ov.Core().compile_model(onnx, 'CPU', dict(INFERENCE_NUM_THREADS=threads, INFERENCE_PRECISION_HINT=precision, PERFORMANCE_HINT='LATENCY'))
        return lambda x: m(dict(ct=x))[0]
    import torch
    from covid3d.weights import load_all, weights_in
    torch.set_num_threads(threads)
    net = load_all(weights_in('covid3d'), 'cpu')[0]
    if way=='channels last': net = net.to(memory_format=torch.channels_last_3d)
    if way=='compiled': net = torch.compile(net)
    def call(x):
        with torch.inference_mode(), torch.autocast('cpu', torch.bfloat16, enabled=way=='bfloat16'):
            x = torch.from_numpy(x)
            if way=='channels last': x = x.to(memory_format=torch.channels_last_3d)
            return net(x).float().sigmoid().numpy()
    return call

def child(way, threads, onnx, data):
    "Serve rounds: a line in, seconds out"
    x = np.load(data, mmap_mode='r'); t = time.perf_counter()
    call = ready(way, threads, onnx); call(np.array(x[:4]))
    print(time.perf_counter()-t, flush=True)
    for line in sys.stdin:
        t = time.perf_counter(); out = [call(np.array(x[i:i+4])) for i in range(0, len(x), 4)]
        print(time.perf_counter()-t, flush=True)
        if line.strip(): np.save(line.strip(), np.concatenate(out))

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for k,v in dict(rounds=9, threads=2, ways=','.join(ways), way='', onnx='', data='').items(): p.add_argument(f'--{k}', default=v, type=type(v))
    a = p.parse_args()
    if a.way: return child(a.way, a.threads, a.onnx, a.data)
    env = os.environ|dict(OMP_NUM_THREADS=str(a.threads), MKL_NUM_THREADS=str(a.threads), PYTHONWARNINGS='ignore')
    with tempfile.TemporaryDirectory() as d:
        from covid3d.export import export_onnx
        onnx,data = str(export_onnx(Path(d)/'net.onnx')),f'{d}/x.npy'
        np.save(data, windows(a.threads))
        def start(way): return subprocess.Popen([sys.executable, __file__, '--way', way, '--threads', str(a.threads), '--onnx', onnx, '--data', data], env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        runs,first,times,answers = {},{},{},{}
        for way in a.ways.split(','): runs[way] = start(way); first[way] = float(runs[way].stdout.readline()); print(way, first[way], flush=True)
        for i in range(a.rounds):
            for way,r in runs.items():
                r.stdin.write(f'{d}/{len(answers)}.npy\n' if i==0 else '\n'); r.stdin.flush(); times.setdefault(way, []).append(float(r.stdout.readline()))
                if i==0: r.stdin.flush(); answers[way] = f'{d}/{len(answers)}.npy'
        for r in runs.values(): r.stdin.close(); r.wait()
        out = {k:np.load(v) for k,v in answers.items()}; base = out['eager']; rows = []
        for way,t in times.items():
            rows.append(dict(way=way, start_s=round(first[way], 1), scan_s=round(statistics.median(t), 2), least=round(min(t), 2), greatest=round(max(t), 2), apart=float(f'{np.abs(out[way]-base).max():.1e}'),
                             flips=round(1e5*float(((out[way]>=.5)!=(base>=.5)).mean()), 2), windows=len(base), rounds=a.rounds, threads=a.threads))
    pd.DataFrame(rows).to_csv(here/'runtimes.csv', index=False); print(pd.DataFrame(rows).to_string())

if __name__=='__main__': main()
