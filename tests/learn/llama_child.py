"""llama.cpp in a process of its own, as its threads live as long as the process: a job on stdin, its answers on stdout."""

import json
import sys
import urllib.request

import xllamacpp

job = json.load(sys.stdin)
options = xllamacpp.CommonParams()
options.model.path = job["base"]
if job["adapter"]:
    adapter = xllamacpp.CommonAdapterLoraInfo()
    adapter.path, adapter.scale = job["adapter"], 1.0
    options.lora_adapters = [adapter]
options.n_parallel, options.n_ctx = 1, 512
options.cpuparams.n_threads = options.cpuparams_batch.n_threads = job["threads"]
options.warmup, options.ui, options.verbosity = False, False, 0
options.cache_ram_mib, options.cache_idle_slots = 0, False  # no answer may come of another prompt's state
server = xllamacpp.Server(options)
answers = []
for prompt in job["prompts"]:
    asked = {"prompt": prompt, "max_tokens": job["tokens"], "temperature": 0.0, "cache_prompt": False, "logprobs": 20}
    answers.append(server.handle_completions(asked))
ids = []
for text in job["texts"]:
    body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
    with urllib.request.urlopen(f"{server.listening_address}/tokenize", body) as reply:
        ids.append(json.load(reply)["tokens"])
json.dump({"answers": answers, "ids": ids}, sys.stdout)
