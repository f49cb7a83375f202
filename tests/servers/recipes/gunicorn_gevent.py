# the first lines of gunicorn.conf.py
from gevent import monkey

monkey.patch_all()
