# gunicorn.conf.py
preload_app = True
