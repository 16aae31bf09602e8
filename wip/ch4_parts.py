"""The parts of experiment 04/scaled, one by one: JSON and images of each (seed, variant) in PARTS; what is there is skipped."""
import json, os, sys, pathlib, time
sys.path[:0] = [sys.argv[1] + "/chapters/experiments"]
import torch
import chapter_04 as c, common
from book import load_data
parts = pathlib.Path(sys.argv[2]); parts.mkdir(exist_ok=True)
_, settings = common.EXPERIMENTS["04/scaled"]
test = load_data("test", version=2)
for seed in settings["seeds"]:
    for number, (name, (width, _)) in enumerate(c.VARIANTS.items()):
        path = parts / f"{seed}-{number}.json"
        if path.exists(): continue
        started, cpu = time.time(), time.process_time()
        model, losses = c.new_training(settings["steps"], settings["batch"], name, seed)
        curve = common.means(list(losses), 20)
        eps_errors, z_errors = c.errors_by_t(model, settings["t"], width)
        accuracy = c.prompt_accuracy(c.draw_captions(model, test.captions[:128], 3.0, seed=0), test.rows[:128])
        shares = {key: common.short(accuracy[key]) for key in ("all", "colour", "shape")}
        if seed == settings["seeds"][0]:
            torch.save(c.draw_captions(model, settings["prompts"], 3.0, seed=0), parts / f"{seed}-{number}.pt")
        record = {"variant": name, "seed": seed, "accuracy": shares, "eps_by_t": eps_errors, "z0_by_t": z_errors, "mse": curve, "minutes": (time.time()-started)/60, "cpu_minutes": (time.process_time()-cpu)/60}
        path.write_text(json.dumps(record)); print(seed, name, shares, curve[-1], round(record["minutes"],1), flush=True)
