import re,sys,os,tempfile,doctest,importlib,time
page=open("/tmp/wt/teach/docs/how-to/distill-a-student.md").read()
os.chdir(tempfile.mkdtemp())
t=time.process_time(); ns={"__name__":"page"}
for m in re.finditer(r"```python\n(.*?)```",page,re.S):
    exec(m.group(1),ns); print("--",time.process_time()-t,flush=True)
for n in ():
    print(n,doctest.testmod(importlib.import_module(n),optionflags=doctest.ELLIPSIS),flush=True)
