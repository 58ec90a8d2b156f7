"""What goes wrong with weights of other libraries."""


class WeightsError(ValueError):
    """Weights that cannot be used; the message is one sentence that says why and what to do."""


# How the size of images is given, in messages.
SIZE = 'image_shape=(height, width, channels)'
