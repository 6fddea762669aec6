import json, torch
from .test_main import *
def test_x(write_job, make_job, blocks, teacher, tmp_path):
    path=write_job()
    from rdd_pipeline.training.__main__ import JobFile,_samples
    spec=JobFile.model_validate_json(path.read_text())
    print("JOB", spec.job==make_job())
    s=_samples(spec,tmp_path,blocks.root)
    print("SAMPLES", tuple(s)==tuple(blocks.samples))
    t=load_checkpoint(tmp_path/"teacher.safetensors")
    print("T", t.digest()==teacher.digest(), t.header==teacher.header)
    def go(job,samples,te,tr): return train(job,samples,trainer=tr,teacher=te).network.digest()[:6]
    A=TrainerParams(device="cpu")
    print(go(make_job(),blocks.samples,teacher,A),go(make_job(),blocks.samples,teacher,A),go(spec.job,blocks.samples,teacher,A),go(make_job(),s,teacher,A),go(make_job(),blocks.samples,t,A),go(make_job(),blocks.samples,teacher,spec.trainer))
    assert 0
