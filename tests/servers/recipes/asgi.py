# asgi.py
import flags

flags.client.load_feature_flags()  # now, and not in the event loop at the first request
