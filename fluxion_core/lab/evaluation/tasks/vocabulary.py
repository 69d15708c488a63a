"""Words that generated texts are made of: our own lists, in no particular order."""

from __future__ import annotations

NOUNS: tuple[str, ...] = tuple(
    """
    anchor apple arch arrow attic autumn badge bakery balcony banner barn barrel basin
    basket beach beacon bell bench birch blanket blossom boat bonfire bookshop bottle
    boulder bracelet branch bread bridge brook broom bucket building bundle butter cabin
    cabinet cactus camera campfire canal candle canoe canyon captain cargo carpet cart
    castle cathedral cavern ceiling cellar chair chalk chapel charcoal cherry chimney
    cinnamon circus cliff clock cloud coast coffee column compass copper corner cottage
    cotton courtyard cradle crane crater creek cricket crown crystal cupboard curtain
    cushion daisy dancer desert diary dinner dolphin donkey doorway dragon drawer driver
    drum eagle easel echo elbow elder ember engine envelope evening fabric factory falcon
    farmer feather fence ferry fiddle field finger fireplace fisherman flag flame flute fog
    forest fork fountain fox garden garlic gate ginger glacier glove goose grain granite
    grape grass gravel guitar gull hallway hammer harbor harvest hatch hawk hazel hedge
    helmet heron hill honey horizon horse hotel hour island ivory ivy jacket jar jewel
    journal journey jungle kettle key kitchen kite knight ladder lagoon lake lamp lantern
    lawn leaf leather ledger lemon letter library lighthouse lily linen lion lizard lobster
    locket lumber machine magnet mango mantle maple marble market mast meadow melon merchant
    mill miner mirror mitten monk moon morning mosaic moss motor mountain mule museum
    mushroom needle nest nickel night notebook oak oar oasis ocean office olive onion orange
    orchard orchid otter oven owl oyster paddle palace paper parade parcel parrot path
    pavement peach pebble pelican pencil pepper petal piano picnic pigeon pillow pine pirate
    planet plateau plum pocket poem pond poplar porch potter prairie prism puddle pulley
    pumpkin quarry quartz quilt rabbit radio raft railway rain ranch raven reed reef ribbon
    rice ridge ring river road robin rocket roof rope rose saddle sail salmon sandal scarf
    school seed shadow shelf shell shepherd ship shore shovel shrub signal silk silver
    singer sister skater sleigh smith smoke snow soldier song sparrow spice spider spiral
    spoon spring square squirrel stable stair statue steam stone storm stove straw stream
    street studio sugar summer swan table tailor teacher teapot temple tent theater thistle
    thread thunder ticket tiger timber tower trail train treasure tulip tunnel turtle
    umbrella uncle valley vase velvet vessel village vine violin voyage wagon walnut
    wardrobe water wave weaver wheat wheel whistle willow window winter wolf wood wool
    writer yard yarn year zebra zipper
    """.split()  # noqa: SIM905
)

ADJECTIVES: tuple[str, ...] = tuple(
    """
    amber ancient azure bitter blue bold brave brief bright brittle broad bronze busy calm
    careful cheerful chilly clear clever coarse cold colorful cozy crimson crisp curious
    damp dark deep delicate distant dry dusty eager early elegant empty faint fair famous
    fancy fierce firm flat fragile fragrant free fresh friendly frosty gentle giant glad
    glossy golden grand grateful gray great green happy hardy heavy hidden hollow honest
    humble icy idle jolly keen kind large late lazy light little lively lonely long loud
    loyal lucky mellow merry mild misty modern modest narrow neat new noble noisy old open
    pale patient plain playful polite proud purple quick quiet rapid rare red rich ripe
    rough round royal rustic salty scarlet shady sharp shiny short shy silent simple sleepy
    slim slow small smooth soft solid sour spare stately steady steep stout strange strong
    sturdy sunny sweet swift tall tame tender thin tidy tiny vast violet vivid warm wary
    weary white wide wild windy wise yellow young
    """.split()  # noqa: SIM905
)

VERBS: tuple[str, ...] = tuple(
    """
    admired answered borrowed built carried chose cleaned climbed collected counted covered
    crossed described discovered drew entered explored followed forgot found gathered
    guarded heard held hid hung inspected kept left lifted loved measured mended missed
    moved noticed opened ordered packed painted passed polished praised preferred pulled
    pushed reached remembered repaired replaced returned saved searched shared sketched sold
    studied touched traded visited walked washed watched weighed wrapped
    """.split()  # noqa: SIM905
)

PLACES: tuple[str, ...] = tuple(
    """
    near beside behind beyond under above around inside outside past toward along
    """.split()  # noqa: SIM905
)
