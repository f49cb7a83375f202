# gunicorn.conf.py
import gc

preload_app = True


def when_ready(server):
    import flags

    flags.client.load_feature_flags()
    gc.collect()
    gc.freeze()
