# pool.py
import multiprocessing

import flags


def price(person):
    found = flags.client.evaluate_flags(person, only_evaluate_locally=True)
    return 90 if found.is_enabled("cheaper") else 100


if __name__ == "__main__":
    with multiprocessing.Pool(4) as pool:
        print(pool.map(price, ["anna", "ben", "carl", "dora"]))
