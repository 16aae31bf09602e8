import subprocess, sys, re, pathlib, os
nb, out = sys.argv[1:3]
py = "/work/main/.venv/bin/python"
subprocess.run([py, "-m", "jupyter", "nbconvert", "--to", "html", "--output", "/tmp/view/page.html", nb], check=True, capture_output=True)
s = pathlib.Path("/tmp/view/page.html").read_text()
s = re.sub(r"<script[^>]*(mathjax|require)[^>]*>.*?</script>", "", s, flags=re.S|re.I)
kd = "/tmp/view/node_modules/katex/dist"
s = s.replace("</head>", f'''<link rel="stylesheet" href="file://{kd}/katex.min.css"><script src="file://{kd}/katex.min.js"></script><script src="file://{kd}/contrib/auto-render.min.js"></script>
<style>.celltag_hide-input .jp-InputArea {{display:none}} .jp-InputPrompt,.jp-OutputPrompt{{display:none!important}}</style>
<script>window.addEventListener("load",()=>{{renderMathInElement(document.body,{{delimiters:[{{left:"$$",right:"$$",display:true}},{{left:"$",right:"$",display:false}}],throwOnError:false}});document.querySelectorAll("details").forEach(d=>d.open=true)}})</script></head>''')
pathlib.Path("/tmp/view/page.html").write_text(s)
from playwright.sync_api import sync_playwright
with sync_playwright() as p:
    b = p.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox","--disable-gpu","--allow-file-access-from-files"])
    pg = b.new_page(viewport={"width": 980, "height": 1700})
    pg.goto("file:///tmp/view/page.html"); pg.wait_for_timeout(2500)
    h = pg.evaluate("document.documentElement.scrollHeight"); print("height", h)
    pg.set_viewport_size({"width": 980, "height": h})
    pg.wait_for_timeout(500)
    for i in range(0, h, 1700):
        pg.screenshot(path=f"{out}-{i//1700:02d}.png", clip={"x":0,"y":i,"width":980,"height":min(1700,h-i)})
    b.close()
