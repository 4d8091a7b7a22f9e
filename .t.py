import time, torch
from octavo.recipes.frame import Lab
from octavo.recipes.frame.study import Study
from octavo.recipes.testbeds.students import *
from octavo.training.teaching import *
study=Study("x",system="",source="",metric="",higher=True,data="",claims={})
lab=Lab(study)
t=time.process_time(); parts=reviews(lab); print("reviews",time.process_time()-t, len(parts.train), sum(b["input_ids"].numel() for b,_ in parts.train))
T=pretrained()
lesson=Lesson(T,[Relations(12)],remember=torch.float16)
texts=[b for b,_ in spaced(parts.train,12)]
s=encoder(3,96,0)
t=time.process_time()
for b in texts: lesson(s,b)
print("teacher+student per batch",(time.process_time()-t)/12)
for d,w in ((3,96),(6,96)):
    s=encoder(d,w,0)
    t=time.process_time(); fit(s,lambda e:texts,lesson,epochs=2); print(d,"teach step",(time.process_time()-t)/24)
c=Classifier(encoder(3,96,0))
ex=spaced(parts.train,12)
t=time.process_time(); fit(c,lambda e:ex,cross_entropy,epochs=2); print("label step",(time.process_time()-t)/24)
f=Filling(encoder(3,96,0)); 
t=time.process_time(); fit(f,with_gaps(texts,0),filled,epochs=2); print("gap step",(time.process_time()-t)/24)
c=Classifier(T); T.requires_grad_(True)
t=time.process_time(); fit(c,lambda e:ex[::4],cross_entropy,epochs=1); print("minilm step",(time.process_time()-t)/3)
